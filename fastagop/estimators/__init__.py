"""What the estimators share: parameters, data in and out, the kernel machine, files."""
