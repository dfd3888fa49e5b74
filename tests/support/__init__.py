"""What the tests share: servers, databases, real workers and the project those workers run."""
