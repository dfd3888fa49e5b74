"""Programs that the tests run in interpreters of their own: to fork from, to monkey patch, to interrupt."""
