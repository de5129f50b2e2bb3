"""Example plug-in for s2ap-deploy; a module is imported only when a command or recipe names its object."""
