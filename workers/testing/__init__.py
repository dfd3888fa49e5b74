"""For tests of projects that use this package."""
