"""Plans before a weight is read: sizes of a model in every format, where they run, how fast, and the cost of building
them.
"""
