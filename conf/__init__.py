"""Configuration: a typed schema, the loader of the command line, and the checks across fields.

Imports neither torch nor any other package of the project: a bad config dies before anything heavy is loaded.
"""
