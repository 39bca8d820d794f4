exports.mount = () => { throw new Error('file restore is not driven here') }
