"""Tasks, one folder each, found by the entry point group `apr_ray.tasks`."""
