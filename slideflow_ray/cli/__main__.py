"""`python -m slideflow_ray.cli`."""

from slideflow_ray.cli import main

main()
