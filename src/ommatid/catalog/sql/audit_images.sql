-- audit_images(sae, latent, class, part, rank): images that show what the audit says of a pair that was tested.
CREATE TABLE audit_images AS
SELECT *
FROM read_parquet($audit_images)
ORDER BY sae, latent, class, part, rank;
