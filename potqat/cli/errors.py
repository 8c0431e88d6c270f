"""How a verb ends early, beside ``ValueError`` and ``OSError``: ``main`` prints one line and sets the exit status."""


class Usage(Exception):
    """Arguments that parse but do not make sense together: exit 2."""


class Stopped(Exception):
    """Ctrl-C after which the work can go on, with a message that says how: exit 130."""
