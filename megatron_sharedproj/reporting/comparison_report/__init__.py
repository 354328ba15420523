"""The report of compared variants: reading, statistics, tables, plots and pages."""
