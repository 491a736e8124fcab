// pg-promise, each way as its documentation shows it: node peers.mjs CONNECTION-AS-JSON TABLE
// A line "WAY ROWS SIZE" on stdin is answered by the rows per second, on a line of stdout.
import readline from "node:readline";
import pgPromise from "pg-promise";

const [, , connection, table] = process.argv;
const pgp = pgPromise();
const db = pgp({ ...JSON.parse(connection), max: 1 });
const columns = new pgp.helpers.ColumnSet(["user_id", "amount", "status"], { table });
const insert = `INSERT INTO ${table} (user_id, amount, status) VALUES ($1, $2, $3) RETURNING *`;
const payments = (first, size) =>
  Array.from({ length: size }, (_, i) => ({ user_id: first + i, amount: "100.00", status: "pending" }));

const ways = {
  "tx.batch": (rows) => db.tx((t) => t.batch(rows.map((row) => t.one(insert, [row.user_id, row.amount, row.status])))),
  "helpers.insert": (rows) => db.many(pgp.helpers.insert(rows, columns) + " RETURNING *"),
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const [way, rows, size] = line.split(" ");
  const begin = performance.now();
  for (let first = 0; first < Number(rows); first += Number(size)) {
    const written = await ways[way](payments(first, Number(size)));
    if (written.length !== Number(size)) throw new Error(`${written.length} rows of ${size}`);
  }
  console.log((Number(rows) / (performance.now() - begin)) * 1000);
}
pgp.end();
