-- audits(sae): what was audited for features that go with a class for the wrong reason, what was left out, and how many were found.
CREATE TABLE audits AS
SELECT *
FROM read_parquet($audits)
ORDER BY sae;
