"""What the process that renders chat templates may take. (The server reads this, and does not import the language.)"""

MOST_SECONDS = 2.0  # of processor time, for one text
MOST_BYTES = 1 << 29  # of address space, the interpreter's own included
MOST_CHARACTERS = 1 << 23  # of one text
