"""Keep the classes of Spark and Delta as the JVM has loaded them: python tests/spark_classes.py ARCHIVE.

A JVM with `-XX:SharedArchiveFile=ARCHIVE` starts a session with two thirds of the CPU time. It ignores an archive that
is not there, or that another Java or other jars have made.
"""

import os
import sys
import tempfile
from collections.abc import Iterator

import pyarrow as pa

from csrm.spark.session import build_session


def same(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches


def main() -> None:
    """Do in one session what nights do, so that their classes are in the archive."""
    os.environ["SPARK_SUBMIT_OPTS"] = f"-XX:TieredStopAtLevel=1 -XX:ArchiveClassesAtExit={os.path.abspath(sys.argv[1])}"
    spark = build_session("csrm-spark-classes")
    from delta.tables import DeltaTable

    with tempfile.TemporaryDirectory() as folder:
        spark.range(10).selectExpr("id", "string(id) text").write.parquet(f"{folder}/input")
        df = spark.read.parquet(f"{folder}/input").mapInArrow(same, "id long, text string")
        ranked_df = df.selectExpr("*", "row_number() over (partition by id % 2 order by text) place")
        table = f"{folder}/table"
        ranked_df.write.format("delta").option("delta.enableChangeDataFeed", "true").save(table)
        ranked_df.where("id > 5").write.format("delta").mode("overwrite").option("replaceWhere", "id > 5").save(table)
        merge = DeltaTable.forPath(spark, table).alias("t").merge(ranked_df.alias("s"), "t.id = s.id and s.place > 1")
        merge.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()
        changes = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 0)
        changes.load(table).groupBy("_change_type").count().collect()
        spark.read.format("delta").load(table).join(df, "id").groupBy("place").count().collect()


if __name__ == "__main__":
    main()
