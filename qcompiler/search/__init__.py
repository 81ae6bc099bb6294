"""Decisions by measurement: cost, the speed guard and the accuracy guard."""
