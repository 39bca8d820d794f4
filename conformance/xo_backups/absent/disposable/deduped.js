exports.deduped = open => open
