"""What the doctor says of code that it has read: one rule for each kind of fault."""
