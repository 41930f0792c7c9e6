"""What ``dsv3`` does when it is called by name: a command is a module of that name.

Each says what it is for (``HELP``, ``EXAMPLE``), takes its options (``add_options``) and does its
work (``run``, which returns an exit code). ``dsv3.cli`` imports them all to read one command line,
so they import what is heavy, torch above all, in ``run``. The other modules here are what a command
is made of.
"""
