"""Calibration: readers, streaming statistics, range estimators and observation."""
