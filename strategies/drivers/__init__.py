"""What differs from driver to driver, one module for each."""
