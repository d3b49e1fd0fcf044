-- A run's tables as DuckDB views, all labels of scores at once (column `scores`). First say which run:
--
--     duckdb -cmd "SET VARIABLE run = 'runs/demo/run'" -init configs/sql/views.sql
--
-- From Python: duckdb.execute("SET VARIABLE run = …"), then duckdb.execute(Path("configs/sql/views.sql").read_text()).
-- Where run.store named another run, its corpus is read from there: SET VARIABLE home = '…'. For s3:// runs: INSTALL httpfs.

-- query, query_source_id, side, rank, id, score, source_id, label, snippet: every query's strongest examples, both ends
CREATE OR REPLACE VIEW by_query AS
SELECT regexp_extract(filename, 'index/([^/]+)/', 1) AS scores, * EXCLUDE (filename)
FROM read_parquet(getvariable('run') || '/index/*/by_query.parquet', filename = true, union_by_name = true);

-- id, query, side, rank, score: the same by training example
CREATE OR REPLACE VIEW influenced AS
SELECT regexp_extract(filename, 'index/([^/]+)/', 1) AS scores, * EXCLUDE (filename)
FROM read_parquet(getvariable('run') || '/index/*/influenced.parquet', filename = true, union_by_name = true);

-- id, self_influence, total, loss, quarantined, source_id, label, snippet: every training example
CREATE OR REPLACE VIEW by_example AS
SELECT regexp_extract(filename, 'index/([^/]+)/', 1) AS scores, * EXCLUDE (filename)
FROM read_parquet(getvariable('run') || '/index/*/by_example.parquet', filename = true, union_by_name = true);

-- query, predicted, misclassified, loss, source_id, label, snippet: every query
CREATE OR REPLACE VIEW queries AS
SELECT regexp_extract(filename, 'index/([^/]+)/', 1) AS scores, * EXCLUDE (filename)
FROM read_parquet(getvariable('run') || '/index/*/queries.parquet', filename = true, union_by_name = true);

-- id, source_id, doc_id, chunk, length and the corpus's own fields: the full training records
CREATE OR REPLACE VIEW train AS
SELECT *
FROM read_parquet(coalesce(getvariable('home'), getvariable('run')) || '/corpus/train/*/rows.parquet', union_by_name = true);
