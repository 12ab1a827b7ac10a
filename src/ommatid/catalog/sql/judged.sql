-- judged(sae, dictionary, latent, judge): the monosemanticity of a latent by each judge, with the judge's floor, for the SAE, the raw
-- neurons, an untrained SAE and the other baselines. Compare ms - floor; ms itself is not comparable between judges.
CREATE TABLE judged AS
SELECT *
FROM read_parquet($judged)
ORDER BY sae, dictionary, latent, judge;
