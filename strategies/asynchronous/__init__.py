"""Units of work of coroutines: the synchronous code as it is, in a greenlet on the event loop."""
