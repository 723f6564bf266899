"""A folder that `equipoise wrap` puts on PYTHONPATH; Python runs the sitecustomize in it at its start."""
