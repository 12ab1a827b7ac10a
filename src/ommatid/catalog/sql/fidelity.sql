-- fidelity(sae, dictionary, kind): how faithfully evaluation tokens of one kind, or of all kinds, are reconstructed.
CREATE TABLE fidelity AS
SELECT *
FROM read_parquet($fidelity)
ORDER BY sae, dictionary, kind;
