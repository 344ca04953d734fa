"""The names of precisions, as settings and flags take them. Free of torch, so that a command line is read at once."""

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")
