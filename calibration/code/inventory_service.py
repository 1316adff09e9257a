"""A small inventory service: SQLite storage, domain rules, and an HTTP interface on asyncio streams."""

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
import uuid
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from http import HTTPStatus
from pathlib import Path

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS products (
    id          TEXT PRIMARY KEY,
    sku         TEXT NOT NULL UNIQUE,
    name        TEXT NOT NULL CHECK (length(name) > 0),
    price_cents INTEGER NOT NULL CHECK (price_cents >= 0),
    created_at  REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS movements (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    product_id TEXT NOT NULL REFERENCES products(id) ON DELETE CASCADE,
    quantity   INTEGER NOT NULL CHECK (quantity <> 0),
    reason     TEXT NOT NULL,
    at         REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS movements_by_product ON movements (product_id, at);
"""


class NotFound(LookupError):
    """No such product."""


class OutOfStock(Exception):
    def __init__(self, sku: str, wanted: int, available: int) -> None:
        super().__init__(f"{sku}: {wanted} wanted, {available} available")
        self.sku, self.wanted, self.available = sku, wanted, available


@dataclass(frozen=True, slots=True)
class Product:
    id: str
    sku: str
    name: str
    price_cents: int
    stock: int = 0

    @property
    def price(self) -> Decimal:
        return Decimal(self.price_cents) / 100


class Inventory:
    def __init__(self, path: Path | str = ":memory:") -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(SCHEMA)

    @contextlib.contextmanager
    def _transaction(self):
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        else:
            self._db.execute("COMMIT")

    def add(self, sku: str, name: str, price: str) -> Product:
        try:
            cents = int((Decimal(price) * 100).to_integral_exact())
        except InvalidOperation as error:
            raise ValueError(f"price {price!r} is not a number") from error
        product_id = uuid.uuid4().hex
        with self._transaction() as db:
            db.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?)", (product_id, sku, name, cents, time.time()))
        return Product(product_id, sku, name, cents)

    def get(self, sku: str) -> Product:
        row = self._db.execute(
            """
            SELECT p.*, COALESCE(SUM(m.quantity), 0) AS stock
            FROM products p LEFT JOIN movements m ON m.product_id = p.id
            WHERE p.sku = ? GROUP BY p.id
            """,
            (sku,),
        ).fetchone()
        if row is None:
            raise NotFound(sku)
        return Product(row["id"], row["sku"], row["name"], row["price_cents"], row["stock"])

    def move(self, sku: str, quantity: int, reason: str) -> Product:
        """Books goods in (positive) or out (negative); never below zero."""
        with self._transaction() as db:
            product = self.get(sku)
            if product.stock + quantity < 0:
                raise OutOfStock(sku, -quantity, product.stock)
            db.execute(
                "INSERT INTO movements (product_id, quantity, reason, at) VALUES (?, ?, ?, ?)",
                (product.id, quantity, reason, time.time()),
            )
        return self.get(sku)

    def report(self, below: int = 10) -> list[dict[str, object]]:
        rows = self._db.execute(
            """
            SELECT p.sku, p.name, COALESCE(SUM(m.quantity), 0) AS stock, MAX(m.at) AS last_moved
            FROM products p LEFT JOIN movements m ON m.product_id = p.id
            GROUP BY p.id HAVING stock < ? ORDER BY stock, p.sku
            """,
            (below,),
        )
        return [dict(row) for row in rows]


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request_line, *header_lines = head.split("\r\n")
    method, target, _ = request_line.split(" ", 2)
    headers = dict(line.lower().split(": ", 1) for line in header_lines if ": " in line)
    length = int(headers.get("content-length", 0))
    return method, target, await reader.readexactly(length) if length else b""


def respond(status: HTTPStatus, body: object) -> bytes:
    payload = json.dumps(body, default=str).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


class Server:
    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def route(self, method: str, target: str, body: bytes) -> bytes:
        parts = [part for part in target.split("?")[0].split("/") if part]
        try:
            match (method, parts):
                case ("GET", ["products", sku]):
                    return respond(HTTPStatus.OK, asdict(self.inventory.get(sku)))
                case ("POST", ["products"]):
                    data = json.loads(body)
                    return respond(HTTPStatus.CREATED, asdict(self.inventory.add(data["sku"], data["name"], data["price"])))
                case ("POST", ["products", sku, "movements"]):
                    data = json.loads(body)
                    return respond(HTTPStatus.OK, asdict(self.inventory.move(sku, int(data["quantity"]), data.get("reason", ""))))
                case ("GET", ["report"]):
                    return respond(HTTPStatus.OK, self.inventory.report())
            return respond(HTTPStatus.NOT_FOUND, {"error": f"no route for {method} {target}"})
        except NotFound as error:
            return respond(HTTPStatus.NOT_FOUND, {"error": f"no product {error}"})
        except OutOfStock as error:
            return respond(HTTPStatus.CONFLICT, {"error": str(error), "available": error.available})
        except (ValueError, KeyError, sqlite3.IntegrityError) as error:
            return respond(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(10):
                method, target, body = await read_request(reader)
            writer.write(self.route(method, target, body))
            await writer.drain()
            logger.info("%s %s %.1f ms", method, target, 1000 * (time.perf_counter() - started))
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            logger.warning("dropped connection: %r", error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def main(port: int = 8080) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    server = await asyncio.start_server(Server(Inventory("inventory.db")).handle, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
