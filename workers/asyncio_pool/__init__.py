"""The worker pool `celery worker --pool=asyncio`: many tasks at a time on one event loop.

registering   makes the name known to Celery
pool          `TaskPool`: slots, waiting requests, start and shutdown
loop          the event loop in its thread
job           one task request, from its message to its report
tasks         how a task runs: on the loop, or in a thread
reports       what the consumer's request is told
offloading    results and messages are stored and sent by threads: nothing blocks the loop
threads       those threads
executor      those of `asyncio.to_thread`
beside        the same for the event loops of other worker pools
hub           acknowledgements are sent by the consumer's thread
watchdog      names the task that blocks the loop
identity      `current_task` and `self.request` for child coroutines
"""
