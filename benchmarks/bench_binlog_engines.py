"""
MySQL and MariaDB: full backups and replay of the binlog, next to what the servers' own programs do, in turns.

Backups. MariaDB: mariadb-backup into `zstd -1 -T2`. MySQL: CLONE LOCAL into a directory, then tar into
`zstd -1 -T2`. Both sync what they write. Ours encrypts, checks pages, and stores the binlog of the backup
too. Goals: MariaDB at most the wall time of the pipe, MySQL at least 0.8 of the throughput.

Replay. The same binlog on the same copy: ours as `restore --latest` takes longer than `restore
--immediate`, which includes laying the log out, sealed as it is, and all checks; theirs as `mysqlbinlog |
mysql` into a server that runs already. Goals: 3 times as fast for MySQL, 2.5 times for MariaDB.

    python benchmarks/bench_binlog_engines.py [--engine mysql] [--megabytes 1000] [--transactions 40000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import Product
from tests.integration.mysql.restored import Restores
from tools import provision_binlog

from benchmarks.measure import RESULTS, Cost, machine, plain, ratios, spreads, wait_for_quiet
from cloudsave.engines.binlog.position import number_of, place_of

CONF = {
    "mariadb": {"innodb_log_file_size": "1G", "innodb_buffer_pool_size": "512M"},
    "mysql": {"innodb_redo_log_capacity": "1G", "innodb_buffer_pool_size": "512M"},
}
SERIES = {"mariadb": "10.11", "mysql": "9.7"}
ROW_BYTES = 1000
ROWS_AT_ONCE = 5000
TABLES = 8
CLIENTS = 4


def fill(cluster: BinlogCluster, megabytes: int) -> None:
    """
    Rows of hexadecimal digits, which pack to about a half, in several tables; then all of them into files.
    """
    cluster.sql("CREATE DATABASE d")
    for number in range(TABLES):
        cluster.sql(f"CREATE TABLE d.t{number} (id INT PRIMARY KEY AUTO_INCREMENT, n INT, x VARCHAR(1024))")
    depth = "cte_max_recursion_depth" if cluster.engine == "mysql" else "max_recursive_iterations"
    parts = ", ".join("SHA2(RAND(), 256)" for _ in range(ROW_BYTES // 64))
    for turn in range(megabytes * 1_000_000 // ROW_BYTES // ROWS_AT_ONCE):
        cluster.sql(
            "USE d",
            f"SET SESSION {depth} = {ROWS_AT_ONCE}, sql_log_bin = 0",
            f"INSERT INTO d.t{turn % TABLES} (n, x) WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL"
            f" SELECT n + 1 FROM s WHERE n < {ROWS_AT_ONCE}) SELECT n, CONCAT({parts}) FROM s",
        )
    cluster.restart()


def transactions(cluster: BinlogCluster, count: int) -> None:
    """Small transactions of two statements, from several clients."""

    def work(number: int) -> None:
        with cluster.connect() as session, session.cursor() as cursor:
            for turn in range(count // CLIENTS):
                table = f"d.t{(number + turn) % TABLES}"
                cursor.execute("BEGIN")
                cursor.execute(f"INSERT INTO {table} (n, x) VALUES (%s, REPEAT('r', 200))", (turn,))
                cursor.execute(f"UPDATE {table} SET n = n + 1 WHERE id = %s", (1 + turn * 7 % 5000,))
                cursor.execute("COMMIT")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(command: list[str], *, env: Mapping[str, str] | None = None) -> Cost:
    """
    Run a command to its end. The server is a child of ours, so that not all children can be waited for, as
    `measure.run` does; what the server computes counts for nobody.
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, env={**os.environ, **(env or {})})
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")[-3000:]
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{said}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, after.ru_maxrss / 1024, 0, 0.0)


class Bench:
    """One server, our product and the server's programs."""

    def __init__(self, cluster: BinlogCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.product = Product(folder / "product", cluster)
        self.restores = Restores(self.product)

    def ours(self) -> Cost:
        """A full backup by the command line."""
        command = [sys.executable, "-m", "cloudsave", "--no-progress", "backup", "db", "--full"]
        return run(command, env=self.product.environment)

    def theirs(self) -> Cost:
        """The same by the server's own means, compressed and synced."""
        place = self.folder / "theirs"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o777)
        place.chmod(0o777)
        server, socket = self.cluster.server, self.cluster.socket
        target = place / "backup.zst"
        if self.cluster.engine == "mariadb":
            words = f"{server.bindir}/mariadb-backup --no-defaults --backup --stream=mbstream --parallel=2"
            words += f" --user=root --datadir={self.cluster.data} --socket={socket}"
            script = f"{words} --target-dir={place}/s 2>/dev/null"
        else:
            clone = f"CLONE LOCAL DATA DIRECTORY = '{place}/clone'"
            client = f"{server.bindir}/mysql --no-defaults -uroot -S {socket}"
            script = f'{client} -e "{clone}" && tar -C {place}/clone -c .'
        return run(
            ["bash", "-o", "pipefail", "-c", f"{{ {script}; }} | zstd -q -1 -T2 -o {target} && sync {target}"]
        )

    def replay(self) -> tuple[float, float]:
        """Seconds of ours and of the pipe, for the same transactions."""
        seconds = {}
        for target in ("--immediate", "--latest"):
            into = self.restores.new()
            command = [
                sys.executable,
                "-m",
                "cloudsave",
                "--no-progress",
                *self.restores.arguments(into, target),
            ]
            wait_for_quiet()
            seconds[target] = run(command, env=self.product.environment).wall_seconds
            if target == "--latest":
                shutil.rmtree(into)
            else:
                base = into
        with self.restores.server(base) as server:
            wait_for_quiet()
            piped = run(["bash", "-o", "pipefail", "-c", self._pipe(server)])
        return seconds["--latest"] - seconds["--immediate"], piped.wall_seconds

    def _pipe(self, server: BinlogCluster) -> str:
        bindir = self.cluster.server.bindir
        names = ("mysqlbinlog", "mysql") if self.cluster.engine == "mysql" else ("mariadb-binlog", "mariadb")
        stop = self.product.json("show", self.newest())["stop"]["offset"]
        paths = [path for path in self.cluster.binlogs() if int(path.suffix[1:]) >= number_of(stop)]
        files, start = " ".join(map(str, paths)), place_of(stop)
        client = f"{bindir}/{names[1]} --no-defaults -uroot -S {server.socket} --max-allowed-packet=1G"
        return f"{bindir}/{names[0]} --no-defaults --start-position={start} {files} | {client}"

    def newest(self) -> str:
        """The id of the newest backup."""
        return max(one["backup_id"] for one in self.product.json("list", "db"))


def measure(cluster: BinlogCluster, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Everything, in turns; the first round warms up."""
    if cluster.engine == "mysql":
        cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
    fill(cluster, options.megabytes)
    bench = Bench(cluster, folder)
    ours: list[Cost] = []
    theirs: list[Cost] = []
    for number in range(options.rounds + 1):
        for side, costs in [(bench.ours, ours), (bench.theirs, theirs)][:: 1 if number % 2 else -1]:
            os.sync()
            wait_for_quiet()
            cost = side()
            print(
                f"round {number} {side.__name__:7} {cost.wall_seconds:.2f} s {cost.cpu_seconds:.2f} s CPU",
                flush=True,
            )
            if number:
                costs.append(cost)
    capture = bench.product.capture()
    bench.product.run("backup", "db")
    transactions(cluster, options.transactions)
    cluster.sql("CREATE TABLE d.the_end (i INT)")
    bench.product.wait_for(b"CREATE TABLE d.the_end")
    bench.product.stop(capture)
    replays = [bench.replay() for _ in range(options.rounds)]
    for mine, piped in replays:
        print(f"replay  ours {mine:.2f} s, pipe {piped:.2f} s", flush=True)
    bench.product.close()
    return {
        "machine": machine(),
        "server": f"{cluster.engine} {cluster.server.version}",
        "backup": {
            "ours": plain(spreads(ours)),
            "theirs": plain(spreads(theirs)),
            "ratios": plain(ratios(ours, theirs)),
        },
        "transactions": options.transactions,
        "replay_seconds": replays,
        "replay_times_as_fast": statistics.median(piped / mine for mine, piped in replays),
    }


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--engine", choices=sorted(SERIES), action="append")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--transactions", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not shutil.which("zstd"):
        subprocess.run(["apt-get", "install", "-qy", "zstd"], check=True, stdout=subprocess.DEVNULL)
    for engine in options.engine or sorted(SERIES):
        server = provision_binlog.listing()[(engine, SERIES[engine])]
        folder = Path(tempfile.mkdtemp(prefix="cloudsave-bench-", dir="/var/tmp"))
        folder.chmod(0o755)
        (folder / "product").mkdir()
        factory = BinlogClusterFactory(folder)
        factory.user.own(folder)
        try:
            cluster = factory.create(server, conf=CONF[engine])
            result = measure(cluster, folder, options)
        finally:
            factory.close()
            shutil.rmtree(folder)
        print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1))
        (RESULTS / f"{engine}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
