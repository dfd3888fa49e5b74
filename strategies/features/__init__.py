"""What an app may switch on, one module each."""
