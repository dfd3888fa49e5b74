"""What type checkers refuse, with celery-types: each line that ends in `# wrong` has an error, and no other line."""

from celery import Celery

from celery_alchemy import Alchemy, AsyncDatabaseTask, CurrentAsyncSession, CurrentSession, DatabaseTask

app = Celery("shop")
db = Alchemy(app)


@db.task
def create(self: DatabaseTask, name: str, age: int = 0) -> int:
    self.dbb.add(name)  # wrong
    self.db.ad(name)  # wrong
    return age


@db.task(read_only=True)
def find(session: CurrentSession, name: str) -> str:
    return name


@db.task
async def awaited(self: AsyncDatabaseTask, session: CurrentAsyncSession, name: str) -> int:
    await self.db.ad(name)  # wrong
    return 1


create.delay_on_commit()  # wrong
create.delay_on_commit(1)  # wrong
create.delay_on_commit("ada", agee=1)  # wrong
create.delay("ada", "3")  # wrong
find.delay_on_commit("ada", "lovelace")  # wrong
number: int = find("ada")  # wrong
db.unit_of_work(readonly=True)  # wrong
db.sesion.commit()  # wrong
awaited.delay(1)  # wrong
awaited.delay_on_commit("ada", "lovelace")  # wrong
other: int = awaited("ada")  # wrong
