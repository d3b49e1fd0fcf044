-- Worked queries over the views of views.sql. A slice is any condition on the training records' own fields.

-- The worst 1 % of a slice: the examples of one label whose total over the query set is lowest, the first to drop.
SELECT e.scores, e.id, e.total, e.self_influence, e.snippet
FROM by_example e JOIN train t USING (id)
WHERE t.label = '0'
QUALIFY percent_rank() OVER (PARTITION BY e.scores ORDER BY e.total) < 0.01
ORDER BY e.scores, e.total;

-- Influence rolled up by a field of the training records: what each group did to the predictions, in sum and per example.
SELECT b.scores, t.label AS field, count(DISTINCT b.id) AS examples,
       sum(b.score) AS influence, sum(b.score) FILTER (b.score < 0) AS harm
FROM by_query b JOIN train t USING (id)
GROUP BY ALL
ORDER BY b.scores, influence;

-- Overlap of two methods: of each query's ten strongest proponents, the share that both name.
SELECT a.scores AS first, b.scores AS second, count(*) / 10.0 / (SELECT count(DISTINCT query) FROM by_query) AS overlap
FROM by_query a JOIN by_query b USING (query, side, id)
WHERE a.scores < b.scores AND a.side = 'proponent' AND a.rank < 10 AND b.rank < 10
GROUP BY ALL;
