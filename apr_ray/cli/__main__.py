"""`python -m apr_ray.cli`."""

from apr_ray.cli import main

main()
