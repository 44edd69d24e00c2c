"""Layer 5: tables, plots and reports from the files of a run; no live object is touched."""
