"""The nightly job: what is new or changed, scored; the cohort so far, aggregated; drift, and every slide accounted for.

Import the module you need; this package loads nothing.
"""
