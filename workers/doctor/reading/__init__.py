"""The project's code, read without importing it: modules, what names stand for, and what Sessions go through."""
