"""Instruments: what watches a pipeline run without being part of it.

They nest (see `qcompiler.pipeline.pipeline.Pipeline.run`): the usual order is dump, replay, numerics, verify, time. So
the clock sees only the pass, a broken graph is found before it is run, and a dump can show the figures of the others.
"""
