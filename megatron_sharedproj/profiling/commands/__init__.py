"""The sub-commands of tools/profile.py: a module each, with add_arguments(parser) and run(args)."""
