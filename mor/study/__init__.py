"""Studies: declared grids of training runs, what they measured, and the tables and figures made of that."""
