"""Studies: each script asks one question, plans its runs, and leaves a figure, a small table and a conclusion."""
