"""The report: metrics and pictures of a run in one self-contained HTML file that a person can judge by."""
