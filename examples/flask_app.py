"""A Flask application that writes payments through microbatch.

pip install . flask gunicorn
export DATABASE_URL=postgresql://localhost/shop
cd examples && flask --app flask_app create-tables
gunicorn --worker-class gthread --workers 2 --threads 16 --graceful-timeout 30 flask_app:app
curl -d user_id=1 -d amount=9.50 http://127.0.0.1:8000/payments
"""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation
from typing import Any

import psycopg
from flask import Flask, abort, request

from microbatch import DeliveryTimeout, JobFailed, MicroBatcher, OutcomeUnknown, QueueFull
from microbatch.processors.postgres import PostgresProcessor

Payment = dict[str, Any]

DSN = os.environ["DATABASE_URL"]
CREATE = """
    CREATE TABLE IF NOT EXISTS payments (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL,
        amount numeric(10, 2) NOT NULL CHECK (amount > 0)
    )"""
INSERT = "INSERT INTO payments (user_id, amount) VALUES (%(user_id)s, %(amount)s) RETURNING *"

app = Flask(__name__)
# Made at import, also under `gunicorn --preload`: threads and connections come with the first submit in each worker.
payments: MicroBatcher[Payment, Payment] = MicroBatcher.from_env(PostgresProcessor(DSN, INSERT))


@app.cli.command("create-tables")
def create_tables() -> None:
    with psycopg.connect(DSN) as connection:
        connection.execute(CREATE)


@app.post("/payments")
def pay() -> Any:
    """Answer when the row is committed."""
    row = payments.execute(payment_in_form(), delivery_timeout=5)
    return {"id": row["id"], "amount": str(row["amount"])}, 201


@app.post("/payments/later")
def pay_later() -> Any:
    """Answer at once. A process that is killed takes the row with it; a failure is only logged."""
    payments.submit(payment_in_form())
    return {}, 202


@app.get("/stats")
def stats() -> Any:
    """Of the one process that answers."""
    now = payments.stats()
    return {"completed": now.completed, "failed": now.failed, "outstanding": now.outstanding, "batches": now.batches}


@payments.on(JobFailed)
def not_written(event: JobFailed) -> None:
    app.logger.error("not written: %r (%r)", event.job, event.error)


@app.errorhandler(QueueFull)
@app.errorhandler(DeliveryTimeout)
def try_again(error: Exception) -> Any:
    return {"error": "busy; nothing was written, try again"}, 503


@app.errorhandler(OutcomeUnknown)
def ask(error: Exception) -> Any:
    return {"error": "the payment may have been written or not: look before you repeat it"}, 500


def payment_in_form() -> Payment:
    """Checked here, so that a mistake in a form is a 400; one that the database finds fails its own job alone."""
    try:
        user_id, amount = int(request.form["user_id"]), Decimal(request.form["amount"])
        fits = 0 < user_id < 2**31 and Decimal("0.01") <= amount <= Decimal("99999999.99")
    except (ValueError, InvalidOperation):  # comparing with NaN is one, too
        fits = False
    if not fits:
        abort(400)
    return {"user_id": user_id, "amount": amount}
