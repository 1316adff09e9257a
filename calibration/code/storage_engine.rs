//! A log-structured key-value store: an append-only file, an index in memory, compaction when half of it is garbage.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const TOMBSTONE: u32 = u32::MAX;

#[derive(Debug)]
pub enum StoreError {
    Io(io::Error),
    Corrupt { offset: u64, reason: &'static str },
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        StoreError::Io(error)
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoreError::Io(error) => write!(f, "i/o: {error}"),
            StoreError::Corrupt { offset, reason } => write!(f, "corrupt record at byte {offset}: {reason}"),
        }
    }
}

impl std::error::Error for StoreError {}

#[derive(Clone, Copy)]
struct Location {
    offset: u64,
    length: u32,
}

pub struct Store {
    path: PathBuf,
    writer: BufWriter<File>,
    reader: File,
    index: BTreeMap<Vec<u8>, Location>,
    end: u64,
    garbage: u64,
}

fn crc32(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= byte as u32;
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

impl Store {
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_path_buf();
        let file = OpenOptions::new().create(true).append(true).read(true).open(&path)?;
        let mut store = Store {
            reader: File::open(&path)?,
            writer: BufWriter::new(file),
            path,
            index: BTreeMap::new(),
            end: 0,
            garbage: 0,
        };
        store.replay()?;
        Ok(store)
    }

    /// Reads the log from the start; a record that a crash cut off ends it.
    fn replay(&mut self) -> Result<(), StoreError> {
        let mut input = BufReader::new(File::open(&self.path)?);
        let total = fs::metadata(&self.path)?.len();
        while self.end + 12 <= total {
            let mut header = [0u8; 12];
            input.read_exact(&mut header)?;
            let crc = u32::from_le_bytes(header[0..4].try_into().unwrap());
            let key_len = u32::from_le_bytes(header[4..8].try_into().unwrap());
            let value_len = u32::from_le_bytes(header[8..12].try_into().unwrap());
            let body = key_len as u64 + if value_len == TOMBSTONE { 0 } else { value_len as u64 };
            if self.end + 12 + body > total {
                break;
            }
            let mut data = vec![0u8; body as usize];
            input.read_exact(&mut data)?;
            if crc32(&data) != crc {
                return Err(StoreError::Corrupt { offset: self.end, reason: "checksum" });
            }
            let key = data[..key_len as usize].to_vec();
            let previous = if value_len == TOMBSTONE {
                self.garbage += 12 + body;
                self.index.remove(&key)
            } else {
                let offset = self.end + 12 + key_len as u64;
                self.index.insert(key, Location { offset, length: value_len })
            };
            if let Some(old) = previous {
                self.garbage += 12 + key_len as u64 + old.length as u64;
            }
            self.end += 12 + body;
        }
        Ok(())
    }

    pub fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(&location) = self.index.get(key) else { return Ok(None) };
        self.writer.flush()?;
        self.reader.seek(SeekFrom::Start(location.offset))?;
        let mut value = vec![0u8; location.length as usize];
        self.reader.read_exact(&mut value)?;
        Ok(Some(value))
    }

    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let offset = self.end + 12 + key.len() as u64;
        self.append(key, Some(value))?;
        let location = Location { offset, length: value.len() as u32 };
        if let Some(old) = self.index.insert(key.to_vec(), location) {
            self.garbage += 12 + key.len() as u64 + old.length as u64;
        }
        if self.garbage * 2 > self.end && self.end > 1 << 20 {
            self.compact()?;
        }
        Ok(())
    }

    pub fn delete(&mut self, key: &[u8]) -> Result<bool, StoreError> {
        let Some(old) = self.index.remove(key) else { return Ok(false) };
        self.append(key, None)?;
        self.garbage += 24 + 2 * key.len() as u64 + old.length as u64;
        Ok(true)
    }

    fn append(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        let mut data = key.to_vec();
        data.extend_from_slice(value.unwrap_or(&[]));
        let length = value.map_or(TOMBSTONE, |v| v.len() as u32);
        self.writer.write_all(&crc32(&data).to_le_bytes())?;
        self.writer.write_all(&(key.len() as u32).to_le_bytes())?;
        self.writer.write_all(&length.to_le_bytes())?;
        self.writer.write_all(&data)?;
        self.end += 12 + data.len() as u64;
        Ok(())
    }

    pub fn scan<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + 'a {
        self.index.range(prefix.to_vec()..).map(|(key, _)| key.as_slice()).take_while(move |key| key.starts_with(prefix))
    }

    fn compact(&mut self) -> Result<(), StoreError> {
        let fresh_path = self.path.with_extension("compacting");
        {
            let mut fresh = Store::open(&fresh_path)?;
            let keys: Vec<Vec<u8>> = self.index.keys().cloned().collect();
            for key in keys {
                if let Some(value) = self.get(&key)? {
                    fresh.put(&key, &value)?;
                }
            }
            fresh.writer.flush()?;
            fresh.writer.get_ref().sync_all()?;
        }
        fs::rename(&fresh_path, &self.path)?;
        *self = Store::open(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_reopening() {
        let path = std::env::temp_dir().join(format!("store-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        {
            let mut store = Store::open(&path).unwrap();
            store.put(b"alpha", b"1").unwrap();
            store.put(b"beta", b"2").unwrap();
            store.put(b"alpha", b"3").unwrap();
            assert!(store.delete(b"beta").unwrap());
            store.writer.flush().unwrap();
        }
        let mut store = Store::open(&path).unwrap();
        assert_eq!(store.get(b"alpha").unwrap().as_deref(), Some(&b"3"[..]));
        assert_eq!(store.get(b"beta").unwrap(), None);
        fs::remove_file(&path).unwrap();
    }
}
