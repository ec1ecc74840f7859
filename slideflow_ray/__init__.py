"""Distributed batch inference on large pathology slides, on Ray.

Importing this package loads nothing heavy; import the module you need, for
example ``from slideflow_ray.slides import open_slide``.
"""

__version__ = "0.1.0"
