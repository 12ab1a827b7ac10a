-- fidelity(sae, dictionary, kind): how well reconstructions stand for the evaluation tokens of one kind, or of all.
CREATE TABLE fidelity AS
SELECT *
FROM read_parquet($fidelity)
ORDER BY sae, dictionary, kind;
