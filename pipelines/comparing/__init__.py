"""Runs side by side: the table (`comparison`), what is shown of it (`report`, `curve`), and which rates are usable
(`robustness`).

Pipelines fill a `comparison.Comparison`; commands write its report. Builds on runs and config.
"""
