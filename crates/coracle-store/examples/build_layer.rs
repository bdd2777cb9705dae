//! Times the unpacking of one layer: `build_layer <tar, uncompressed> <empty directory>`.
//!
//! Run it with `--release`; the result is in the directory, for a look with `dump.erofs`.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_base::Cancel;
use coracle_base::time::monotonic;
use coracle_store::layer::{HashingReader, LayerLimits, build_layer, rebuild_tar};
use coracle_store::object::StagedObjects;

fn create_dir(path: &Path) -> Result<OwnedFd, Box<dyn Error>> {
    std::fs::create_dir_all(path)?;
    Ok(File::open(path)?.into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(tar), Some(dir)) = (args.next(), args.next()) else {
        return Err("usage: build_layer <tar> <empty directory>".into());
    };
    let out = create_dir(&dir.join("layer"))?;
    let objects = dir.join("objects");
    let staging = dir.join("staging");
    let mut staged = StagedObjects::new(create_dir(&objects)?, create_dir(&staging)?);
    let begin = monotonic();
    let info =
        build_layer(File::open(tar)?, out.as_fd(), &mut staged, &LayerLimits::default(), &Cancel::new())?;
    let took = begin.elapsed();
    let mut stdout = std::io::stdout();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = info.tar_bytes as f64 / took.as_secs_f64() / 1e6;
    writeln!(stdout, "{} bytes in {took:?}: {rate:.0} MB/s", info.tar_bytes)?;
    writeln!(
        stdout,
        "{} entries, {} objects, {} bytes of them",
        info.entries, info.n_objects, staged.new_bytes
    )?;
    for warning in &info.warnings {
        writeln!(stdout, "warning: {warning}")?;
    }
    for id in &info.objects {
        let path = objects.join(id.path());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::rename(staging.join(id.to_string()), path)?;
    }
    let begin = monotonic();
    let mut rebuilt = HashingReader::new(rebuild_tar(out.as_fd(), create_dir(&objects)?)?);
    let mut buffer = vec![0; 1 << 20];
    while rebuilt.read(&mut buffer)? > 0 {}
    writeln!(stdout, "rebuilt {} in {:?}", rebuilt.finish(), begin.elapsed())?;
    Ok(())
}
