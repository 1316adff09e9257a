"""A cron-like scheduler: expressions, next run times, persistent state and retries with exponential backoff."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

log = logging.getLogger("scheduler")

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 6))
ALIASES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}
WEEKDAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}


class ScheduleError(ValueError):
    """A cron expression that makes no sense."""


def parse_field(text: str, name: str, low: int, high: int) -> frozenset[int]:
    values: set[int] = set()
    for part in text.lower().split(","):
        body, _, step_text = part.partition("/")
        step = int(step_text) if step_text else 1
        if step < 1:
            raise ScheduleError(f"{name}: step must be at least 1 in {part!r}")
        if body == "*":
            first, last = low, high
        elif "-" in body:
            first, last = (to_number(end, name) for end in body.split("-", 1))
        else:
            first = to_number(body, name)
            last = high if step_text else first
        if not low <= first <= last <= high:
            raise ScheduleError(f"{name}: {part!r} is not within {low}-{high}")
        values.update(range(first, last + 1, step))
    return frozenset(values)


def to_number(text: str, name: str) -> int:
    if name == "weekday" and text in WEEKDAYS:
        return WEEKDAYS[text]
    try:
        number = int(text)
    except ValueError:
        raise ScheduleError(f"{name}: {text!r} is not a number") from None
    return 0 if name == "weekday" and number == 7 else number


@dataclasses.dataclass(frozen=True)
class Schedule:
    minute: frozenset[int]
    hour: frozenset[int]
    day: frozenset[int]
    month: frozenset[int]
    weekday: frozenset[int]
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, expression: str) -> Schedule:
        parts = ALIASES.get(expression.strip(), expression).split()
        if len(parts) != len(FIELDS):
            raise ScheduleError(f"expected {len(FIELDS)} fields, found {len(parts)} in {expression!r}")
        values = {name: parse_field(part, name, low, high) for part, (name, low, high) in zip(parts, FIELDS)}
        return cls(**values, any_day=parts[2] == "*", any_weekday=parts[4] == "*")

    def matches_day(self, date: datetime.date) -> bool:
        if date.month not in self.month:
            return False
        by_day = date.day in self.day
        by_weekday = (date.isoweekday() % 7) in self.weekday
        if self.any_day or self.any_weekday:
            return by_day and by_weekday
        return by_day or by_weekday

    def next_after(self, moment: datetime.datetime) -> datetime.datetime:
        start = moment.replace(second=0, microsecond=0) + datetime.timedelta(minutes=1)
        for days in range(366 * 8):
            date = start.date() + datetime.timedelta(days=days)
            if not self.matches_day(date):
                continue
            for hour in sorted(self.hour):
                for minute in sorted(self.minute):
                    found = datetime.datetime.combine(date, datetime.time(hour, minute), moment.tzinfo)
                    if found >= start:
                        return found
        raise ScheduleError("the expression never matches")


@dataclasses.dataclass
class Job:
    name: str
    schedule: Schedule
    command: list[str]
    timeout_s: float = 3600.0
    retries: int = 3
    last_success: datetime.datetime | None = None
    failures: int = 0

    def backoff(self, rng: random.Random) -> float:
        return min(3600.0, 2.0**self.failures * 10.0) * rng.uniform(0.5, 1.5)


class State:
    """What survives a restart, written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, jobs: Iterable[Job]) -> None:
        if not self.path.exists():
            return
        saved = json.loads(self.path.read_text())
        for job in jobs:
            entry = saved.get(job.name, {})
            job.failures = entry.get("failures", 0)
            if entry.get("last_success"):
                job.last_success = datetime.datetime.fromisoformat(entry["last_success"])

    def save(self, jobs: Iterable[Job]) -> None:
        content = {
            job.name: {"failures": job.failures, "last_success": job.last_success and job.last_success.isoformat()}
            for job in jobs
        }
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, self.path)


class Scheduler:
    def __init__(self, jobs: list[Job], state: State, now: Callable[[], datetime.datetime] = datetime.datetime.now) -> None:
        self.jobs, self.state, self.now = jobs, state, now
        self.stopping = threading.Event()
        self.rng = random.Random()
        state.load(jobs)

    def run_job(self, job: Job) -> bool:
        log.info("starting %s", job.name)
        try:
            done = subprocess.run(job.command, timeout=job.timeout_s, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            log.error("%s ran longer than %.0f s", job.name, job.timeout_s)
            return False
        except FileNotFoundError as error:
            log.error("%s cannot start: %s", job.name, error)
            return False
        if done.returncode:
            log.error("%s ended with %d: %s", job.name, done.returncode, done.stderr.strip()[-500:])
        return done.returncode == 0

    def tick(self, job: Job) -> datetime.datetime:
        """Runs the job and returns when it is due again."""
        if self.run_job(job):
            job.failures, job.last_success = 0, self.now()
            due = job.schedule.next_after(self.now())
        elif job.failures < job.retries:
            due = self.now() + datetime.timedelta(seconds=job.backoff(self.rng))
            job.failures += 1
        else:
            log.error("%s failed %d times, waiting for its next regular time", job.name, job.failures + 1)
            job.failures = 0
            due = job.schedule.next_after(self.now())
        self.state.save(self.jobs)
        return due

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        due = {job.name: job.schedule.next_after(self.now()) for job in self.jobs}
        while not self.stopping.is_set():
            job = min(self.jobs, key=lambda one: due[one.name])
            wait = (due[job.name] - self.now()).total_seconds()
            if wait > 0 and self.stopping.wait(min(wait, 60)):
                break
            if wait <= 0:
                due[job.name] = self.tick(job)


def test_every_quarter_of_an_hour_on_weekdays() -> None:
    schedule = Schedule.parse("*/15 9-17 * * mon-fri")
    friday_evening = datetime.datetime(2024, 3, 1, 17, 50)
    assert schedule.next_after(friday_evening) == datetime.datetime(2024, 3, 4, 9, 0)


def test_the_29th_of_february_is_found_in_a_leap_year() -> None:
    assert Schedule.parse("0 0 29 2 *").next_after(datetime.datetime(2025, 1, 1)).year == 2028
