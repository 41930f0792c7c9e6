"""What ``dsv3`` does when it is called by name, a module a command; ``dsv3.cli`` reads the options."""
