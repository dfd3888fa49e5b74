"""What an app may ask for beyond a Session: each subscribes to a seam, and costs nothing where it is off."""
