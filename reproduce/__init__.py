"""Scripts that redo the paper's figures, tables and theory; run them from a checkout, one module an experiment."""
