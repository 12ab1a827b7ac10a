-- images(image): an image of the data set; its encoded bytes stay in the artefact, the thumbnail is here.
CREATE TABLE images AS
SELECT * EXCLUDE (encoded)
FROM read_parquet($images)
ORDER BY image;
