"""Bundles on disk, the networks they name, and the scorer that turns tiles into margins.

``bundle`` reads cards without torch; ``networks`` and ``scorer`` need it.
"""
